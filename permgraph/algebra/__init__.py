"""What is known of a dimension, as a type that unification refines: atoms, products, sums and families."""
