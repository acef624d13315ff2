"""The report: what came out of a run, whether it passed, how big it is and what it cost.

In: a `RunReport` that the sweep filled with plain numbers. Out: a table on the terminal,
`report.html` with plots (nothing loaded from elsewhere), `run.json`, and `metrics.jsonl`, which
grows while the run goes on.
"""
