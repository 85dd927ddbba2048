"""`l2v data build`: from raw text to a data set, streamed, in parallel, restartable, with a report of what was dropped.

`readers` yield raw records in order; `chunk` is the pure function that workers apply to a chunk of them (`records` to rows,
then the filters); `duplicates` compares all rows with each other through flat files on disk; `shards` writes the
remaining rows; `report` and `card` describe the result. `run` composes these steps and resumes after a kill.
"""
