-- Takes or renews a lock. ARGV: key, owner, ttl ms.
-- Returns 0 if another holds it, 1 if it was the owner's already, 2 if it is from now on.
local key, owner, ttl = ARGV[1], ARGV[2], ARGV[3]
local holder = redis.call('GET', key)
if holder and holder ~= owner then return 0 end
redis.call('SET', key, owner, 'PX', ttl)
return holder and 1 or 2
