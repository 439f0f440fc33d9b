"""Cohorts: the layouts in which people hold their data become one table of participants."""
