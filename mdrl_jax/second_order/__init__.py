"""Second derivatives of a model, as functions of arrays and trees: (u, w) jets, Hessian products, Lanczos, Fisher."""
