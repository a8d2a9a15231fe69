"""Where jobs of one command are done: in processes of this machine, as an array of SLURM jobs, or over a Ray cluster.

May import the contract alone: what a job does is its own affair.
"""
