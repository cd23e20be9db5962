"""What starts a job elsewhere: as text, for Slurm, Kubernetes and Ray, which all start torchrun.

launch.py   how many hosts and ranks a job's plan wants, and what may be set
*.j2        what each of them is given (jinja2)
"""
