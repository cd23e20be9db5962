"""How products are made on a CPU, and rows on a GPU: what rooms of every axis multiply with."""
