"""The measuring campaign: one command that measures, on the GPU that is here, what the planner predicts. See README.md."""
