"""Trains a language model by reinforcement learning: ``python train.py --help`` lists the flags."""

import sys

from miles_launcher.train import main

if __name__ == "__main__":
    sys.exit(main())
