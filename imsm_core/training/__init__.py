"""Tuning the adapter and the gate: settings, the loop, schedules, snapshots."""
