-- Limits a tenant, or with '*' all that have no limits of their own. ARGV: tenant, most open jobs and
-- jobs a second, each '-' for none. With none of both it has no limits of its own. Returns 1.
local tenant, open, rate = ARGV[1], ARGV[2], ARGV[3]
if open == '-' and rate == '-' then
  redis.call('HDEL', LIMITS, tenant)
else
  redis.call('HSET', LIMITS, tenant, open .. ' ' .. rate)
  redis.call('PEXPIRE', LIMITS, INDEX_TTL)
end
return 1
