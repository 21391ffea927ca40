"""The bridge to robomimic 0.3: training it with our encoders, rolling out its
checkpoints, exporting ours.

Robomimic keeps which observation is of which modality in global variables (`ObsUtils`),
which every training of its own overwrites: one of them per process. What is loaded here
reads them only while it is being built.
"""
