"""The parts of gpu_report.py.

place        the device, the clock that shares out the time, medians of repeats
calls        calls of ours as data, made on a device; what attention is, in any type
warm         their kernels compiled beforehand, on all cores
correctness  against float64, in memory that holds NaN, and repeats for the same bits; the contract
grid         speed beside torch's own, and what Hopper's schedule may vary
decode       a cache, dense and in pages, against the speed of a copy; one query captured in a graph
checkers     memory checkers, other versions of ptxas
markdown     what was found, as a page
"""
