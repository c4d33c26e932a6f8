"""Runs methods, budgets, lengths and tasks; keeps records; resumes."""
