"""What both training backends share: batches, schedules, losses."""
