"""L8: runs real systems on real input with their own attention and with ours, and reports what it measured.

`rows/` holds one file a system; `run.py` measures each row in a process of its own; `page.py` and `record.py`
write what `anyflash adoption` found.
"""
