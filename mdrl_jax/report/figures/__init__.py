"""The figures of the report, one module for each subject. Every figure is made by a function of the records.

Such a function raises `folder.Absent` if a record that it needs is missing or holds nothing to show, and UserError if a
record is no valid JSON. A record that another version wrote may raise one of the errors in `page.DAMAGED`, for example
KeyError.
"""
