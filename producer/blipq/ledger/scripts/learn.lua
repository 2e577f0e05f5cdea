-- Adds what jobs have taken. ARGV: JSON {ran: {{model, shape, misses, their ms, hits, their ms, run ms
-- in sum}, ...}, used: {{model, tenant, ms}, ...}}; ms are of the GPU, but those of a run, from its claim
-- to its end.
local MEMORY = 200         -- jobs that a mean reaches back, about
local MOST_SHAPES = 1000   -- of a model
local MOST_TENANTS = 1000  -- of a model: what others take is counted under '~others'
local report = cjson.decode(ARGV[1])

local function mean(count, old, more, sum)
  if count + more == 0 then return 0 end
  return (count * old + sum) / (count + more)
end

-- Forgets the oldest error at the same rate, whatever the number of jobs in a beat.
local function note_error(key, count, off, took)
  local old_off, old_took = string.match(redis.call('HGET', key, 'error') or '0 0', '(%S+) (%S+)')
  local keep = (1 - 1 / MEMORY) ^ count
  redis.call('HSET', key, 'error',
    string.format('%.3f %.3f', keep * old_off + off, keep * old_took + took))
end

local function learn(model, shape, misses, miss_ms, hits, hit_ms, run_ms)
  local key = cost_key(model)
  local known = redis.call('HGET', key, shape)
  if not known and redis.call('HLEN', key) > MOST_SHAPES then return end
  local old = {}
  for each in string.gmatch(known or '0 0 0 0 0 0', '%S+') do old[#old + 1] = tonumber(each) end
  local old_misses, old_miss_ms, old_hits, old_hit_ms, share, old_run_ms = unpack(old)
  local before, count, took = math.min(old_misses + old_hits, MEMORY), misses + hits, miss_ms + hit_ms
  if known then
    local hit = old_hits > 0 and old_hit_ms or old_miss_ms
    local miss = old_misses > 0 and old_miss_ms or old_hit_ms
    note_error(key, count, math.abs(count * (share * hit + (1 - share) * miss) - took), took)
  end
  redis.call('HSET', key, shape, string.format('%d %.4f %d %.4f %.4f %.1f',
    math.min(old_misses + misses, MEMORY), mean(old_misses, old_miss_ms, misses, miss_ms),
    math.min(old_hits + hits, MEMORY), mean(old_hits, old_hit_ms, hits, hit_ms),
    mean(before, share, count, hits), mean(before, old_run_ms, count, run_ms)))
  redis.call('PEXPIRE', key, INDEX_TTL)
end

for _, each in ipairs(report.ran) do learn(unpack(each)) end
for _, each in ipairs(report.used) do
  local model, tenant, took = unpack(each)
  local key = used_key(model)
  local fits = redis.call('HEXISTS', key, tenant) == 1 or redis.call('HLEN', key) < MOST_TENANTS
  redis.call('HINCRBYFLOAT', key, fits and tenant or '~others', string.format('%.3f', took))
  redis.call('PEXPIRE', key, INDEX_TTL)
end
