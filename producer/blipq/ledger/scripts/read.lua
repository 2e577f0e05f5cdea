-- Settles what is due and reads the job. ARGV: id, and whether to look ahead (1 or nothing).
-- Returns {live workers of its model, whether its queue is paused (1 or 0), what is ahead of it, field,
-- value, ...}, or {} for an unknown id.
-- Ahead of it is {now, how many jobs or -1 outside its queue}, and where a worker lives, for an ETA, the
-- mix of its model (see count_mix; as it was within a second) and its hash of costs; {} where nobody
-- looks ahead, and of a job that has ended.
local id = ARGV[1]
local job = load(id)
if not job then return {} end

-- Workers take from the queues of a model in the order of their priorities.
local function ahead()
  local place = redis.call('ZRANK', queued_key(job.queue), id)
  if not place then return -1 end
  for _, queue in ipairs(queues_of(model_of(job.queue))) do
    if queue == job.queue then return place end
    place = place + redis.call('ZCARD', queued_key(queue))
  end
end

if not ended(job) and tonumber(job.deadline) <= now then end_job(id, job, 'expired', {}) end
local live = redis.call('ZCOUNT', serving_key(job.model), '(' .. now, '+inf')
local answer = redis.call('HGETALL', job_key(id))
local outlook = {}
if ARGV[2] and redis.call('ZSCORE', OPEN, id) then
  outlook = {now, ahead()}
  if live > 0 then
    outlook[3] = redis.call('GET', mix_key(job.model)) or count_mix(job.model)
    outlook[4] = redis.call('HGETALL', cost_key(job.model))
  end
end
table.insert(answer, 1, outlook)
table.insert(answer, 1, job.status == 'queued' and is_paused(job.queue) and 1 or 0)
table.insert(answer, 1, live)
return answer
