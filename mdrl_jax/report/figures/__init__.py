"""The figures of the report, one module for each subject. Every figure is made by a function of the records."""
