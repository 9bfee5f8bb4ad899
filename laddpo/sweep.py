"""Several jobs from one command line: `-m dpo.beta=0.5,1,2` runs each combination in a process of its own.

Hydra's sweeper and launcher decide which jobs there are and where they run (so joblib, submitit and sweeper plugins
work); the task handed to them starts `python -m laddpo.<stage>` with the job's overrides. Each job has its own folder
below outputs/sweep/<time>/, all share data/reference. Afterwards sweep.json lists jobs, exit codes and results.
"""
