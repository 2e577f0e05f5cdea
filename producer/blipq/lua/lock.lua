-- Takes or renews a lock. ARGV: key, owner, ttl ms. Returns 1 if it is the owner's.
local key, owner, ttl = ARGV[1], ARGV[2], ARGV[3]
local holder = redis.call('GET', key)
if holder and holder ~= owner then return 0 end
redis.call('SET', key, owner, 'PX', ttl)
return 1
