"""The main job measured: where an iteration's time goes, TRL beside it, the weight update's bytes beside a memcpy."""
