-- Of which shapes the jobs of a model are: see count_mix. ARGV: model.
return count_mix(ARGV[1])
