"""One ledger over several cells: which cell a call goes to, and what their answers come to."""
