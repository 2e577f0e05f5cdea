-- One field of each of many jobs. ARGV: the field, then ids. Returns its values; '' of a job without.
local values = {}
for i = 2, #ARGV do values[i - 1] = redis.call('HGET', job_key(ARGV[i]), ARGV[1]) or '' end
return values
