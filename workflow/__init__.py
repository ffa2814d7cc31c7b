"""The chain of stages as a Snakemake workflow, and the settings that it runs."""
