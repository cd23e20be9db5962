"""What a user states: model, cluster, plan, job; and what follows from it: mesh, layout, Program."""
