-- Settles what is due and reads the job. ARGV: id, and whether to look ahead (1 or nothing).
-- Returns {live workers of its model, whether its queue is paused (1 or 0), what is ahead of it, field,
-- value, ...}, or {} for an unknown id.
-- Ahead of it is {now, how many jobs or -1 outside its queue}, and where a worker lives the hashes of
-- work, working and cost, which an ETA needs; {} where nobody looks ahead, and of a job that has ended.
local id = ARGV[1]
local job = load(id)
if not job then return {} end

-- Workers take from the queues of a model in the order of their priorities.
local function ahead()
  local place = redis.call('ZRANK', queued_key(job.queue), id)
  if not place then return -1 end
  local model, own = string.match(job.queue, '^(.+%.)(%a+)$')
  for _, priority in ipairs({'high', 'normal', 'low'}) do
    if priority == own then return place end
    place = place + redis.call('ZCARD', queued_key(model .. priority))
  end
end

if not ended(job) and tonumber(job.deadline) <= now then end_job(id, job, 'expired', {}) end
local live = redis.call('ZCOUNT', serving_key(job.model), '(' .. now, '+inf')
local answer = redis.call('HGETALL', job_key(id))
local outlook = {}
if ARGV[2] and redis.call('ZSCORE', OPEN, id) then
  outlook = {now, ahead()}
  for _, key in ipairs(live > 0 and {work_key(job.model), working_key(job.model), cost_key(job.model)}
    or {}) do
    outlook[#outlook + 1] = redis.call('HGETALL', key)
  end
end
table.insert(answer, 1, outlook)
table.insert(answer, 1, job.status == 'queued' and is_paused(job.queue) and 1 or 0)
table.insert(answer, 1, live)
return answer
