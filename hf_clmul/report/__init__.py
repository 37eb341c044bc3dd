"""What people look at: the report, its figures and tables, the model card."""
