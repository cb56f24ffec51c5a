"""Brief retraining of a lost domain: when it stops, which step it keeps, and how the displacement contracts."""
