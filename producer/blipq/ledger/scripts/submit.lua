-- Records jobs, each once, in order, and stops at the first that is refused.
-- ARGV: retention ms, max open jobs, declared models between spaces, the place of this cell on the
-- jobs' way or '', the next place and cell or '' (see moved_to), the longest retention ms (of dead
-- letters), then of each job: id, digest, idempotency key or '', expires_in ms, its message to publish
-- in this Redis or '', how many arguments its fields take, and its field/value pairs: the second is its
-- kind, the third its model, the fourth its queue and the fifth its shape.
-- Returns of each job that it came to: 'created' | 'waits' | 'unpublished' | 'exists' | 'conflict' |
-- 'full' | 'unknown' | 'limited' | 'moved', then an id; behind 'unknown' it is what workers serve, behind
-- 'limited' which limit of the tenant was met (see limit_met), and behind 'moved' moved_to's reply.
-- 'waits' is created, too, but no worker lives that serves the model; 'unpublished' is, but without its
-- message. 'conflict', 'full', 'unknown' and 'limited' are refusals.
local retention, max_open, declared = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local place, onward, longest = ARGV[4], ARGV[5], tonumber(ARGV[6])
local live, used = {}, {}
-- Whether a job is to move on, or may have: rarely, and this costs less than a look for each job.
local may_move = place ~= '' and (onward ~= '' or redis.call('EXISTS', MOVES) == 1)

local function known(existing, digest)
  local found = redis.call('HMGET', job_key(existing), 'status', 'digest')
  if not found[1] then return nil end
  -- A record without a digest was made for a message that could not be run.
  return found[2] == digest and 'exists' or 'conflict'
end

-- The sweep looks at a queue from now on; for a busy one a write each second is enough.
local function use(queue)
  local last = not used[queue] and tonumber(redis.call('ZSCORE', QUEUES, queue) or 0)
  if last and last < now - 1000 then
    index(QUEUES, now, queue)
    keep(OPEN)
  end
  used[queue] = true
end

-- first, last: of the arguments that are its fields.
local function record(id, digest, given_key, expires_in, message, first, last)
  local idempotency_record = given_key ~= '' and idempotency_key(given_key)
  if idempotency_record then
    local existing = redis.call('GET', idempotency_record)
    local answer = existing and known(existing, digest)
    if answer then return answer, existing end
  end
  local answer = known(id, digest)
  if answer then return answer, id end
  if may_move then
    --RARELY moved_to
    local moved = moved_to(given_key ~= '' and 'k:' .. given_key or 'i:' .. id, place, onward,
      expires_in + longest)
    if moved then return 'moved', moved end
  end
  local model, queue = ARGV[first + 5], ARGV[first + 7]
  if not is_known(model, declared) then
    --RARELY served_models
    return 'unknown', served_models()
  end
  local open = redis.call('ZCARD', OPEN)
  -- A Redis Cluster refuses keys of two slots: before anything of a first job is written.
  if open == 0 then redis.call('EXISTS', OPEN, QUEUES) end
  if open >= max_open then return 'full', id end
  local tenant, rate, met
  for i = first + 8, last, 2 do
    if ARGV[i] == 'tenant' then tenant = ARGV[i + 1] end
  end
  if tenant then
    --RARELY limit_met
    met, rate = limit_met(tenant)
    if met then return 'limited', met end
  end

  local key = job_key(id)
  redis.call('HSET', key, 'digest', digest, 'status', 'queued', 'created_at', now,
    'deadline', now + expires_in, unpack(ARGV, first, last))
  redis.call('PEXPIRE', key, expires_in + retention)
  if idempotency_record then
    redis.call('SET', idempotency_record, id, 'PX', expires_in + retention)
  end
  redis.call('ZADD', OPEN, now + expires_in, id)
  if open == 0 then redis.call('PEXPIRE', OPEN, INDEX_TTL) end  -- it is new; see use
  index(queued_key(queue), now, id)
  local listed = {created_at = now, model = model, kind = ARGV[first + 3], tenant = tenant}
  if tenant then
    --RARELY add_to_tenant use_rate
    add_to_tenant(id, tenant)
    if rate then use_rate(tenant, rate) end
  end
  list_job(id, listed, 'open', expires_in + retention)
  use(queue)
  -- What workers of an earlier version ended is counted still. Not before the first write above: one
  -- that needs no memory would let a script of a full Redis go on.
  if open == 0 then redis.call('DEL', work_key(model), working_key(model)) end
  tally(work_key(model), ARGV[first + 8] == 'work' and ARGV[first + 9], 1)
  -- The job is recorded: a list that may not be written to, or is none, must not fail its submit.
  if message ~= '' and type(redis.pcall('LPUSH', queue, message)) == 'table' then
    return 'unpublished', id
  end
  live[model] = live[model] or live_workers(model)
  return live[model] > 0 and 'created' or 'waits', id
end

local refusals = {conflict = true, full = true, unknown = true, limited = true}
local answers = {}
local i = 7
while i <= #ARGV do
  local last = i + 5 + tonumber(ARGV[i + 5])
  local outcome, id = record(ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), ARGV[i + 4],
    i + 6, last)
  answers[#answers + 1] = outcome
  answers[#answers + 1] = id
  if refusals[outcome] then break end
  i = last + 1
end
return answers
