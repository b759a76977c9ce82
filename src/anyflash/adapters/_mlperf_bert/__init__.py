"""The part of the MLPerf BERT adapter that imports torch; loaded by `install()`."""
