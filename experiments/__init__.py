"""What reproduce.py runs and reports.

scales.py lists the runs, costs.py says what they would take; each experiment has a module that computes tables from
their records, plots them and renders its section of the report, which report.py puts together, demo.py that of the
demo. They share results.py (from records to outcomes), statistics.py and markdown.py. scripts/tables.py makes the
tables of any finished runs.
"""
