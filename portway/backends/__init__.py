"""Model servers: one module per kind, and the connections to them."""
