"""Where rows come from: tables (CSV, JSON lines, Parquet), tars, folders and prefixes."""
