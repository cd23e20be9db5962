"""How ranks come to be: processes or torchrun, looked at before they begin, and how a run ends."""
