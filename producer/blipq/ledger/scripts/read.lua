-- Settles what is due and reads the job. ARGV: id.
-- Returns {live workers of its model, whether its queue is paused (1 or 0), field, value, ...}, or {}
-- for an unknown id.
local id = ARGV[1]
local job = load(id)
if not job then return {} end
if not ended(job) and tonumber(job.deadline) <= now then end_job(id, job, 'expired', {}) end
local live = redis.call('ZCOUNT', serving_key(job.model), '(' .. now, '+inf')
local answer = redis.call('HGETALL', job_key(id))
table.insert(answer, 1, job.status == 'queued' and is_paused(job.queue) and 1 or 0)
table.insert(answer, 1, live)
return answer
