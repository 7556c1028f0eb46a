"""Analyses of a student: functions on networks and batches, their results as plain numbers, and pictures of them."""
