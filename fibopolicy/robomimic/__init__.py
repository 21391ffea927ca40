"""Everything specific to robomimic, 0.3 and 0.5: its policies trained here, its
checkpoints read and written, its own training with our encoders.

robomimic keeps the modality of each observation in a global table (`ObsUtils`), which
each of its training runs overwrites: run one per process. Networks read the table
when they are built; those of 0.5 look again when they act, for language alone.
"""
