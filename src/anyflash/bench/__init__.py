"""L8: the speed of our attention beside that of other packages, on a grid of cells.

cells.py says what a cell is, grid.py lists them, variants.py has the formulas, peers/ holds one file a
package. run.py measures a cell: inputs, agreement with float64 (truth.py, agreement.py), and only then time
(timing.py, ceiling.py). summary.py and report.py turn the records into figures and text.
"""
