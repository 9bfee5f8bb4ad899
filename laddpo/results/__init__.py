"""What is shown of a run: statistics, tables, plots, pages, model cards, exports."""
