"""What reproduce.py runs and reports.

scales.py lists the runs; each experiment's module computes tables from their records, plots them and renders its
section of the report: detection, comparison, epsilon, count, coupling, fancy, baselines, causes, diagnoses, defences.
They share measures.py (records to measures), statistics.py, charts.py and markdown.py; report.py puts the sections
together. compare, diagnoses and defences are also commands for finished runs, ablation is one that attacks.
"""
