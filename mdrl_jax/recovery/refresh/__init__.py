"""Brief retraining of a lost domain: when it stops, which step it keeps, how the displacement contracts."""
