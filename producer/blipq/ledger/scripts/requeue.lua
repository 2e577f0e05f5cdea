-- Gives a running job back. ARGV: id, token, delay ms, 'retry' (counted), 'hand-back' (not) or
-- 'suspect' (not counted either, but from now on it runs alone), and the error of a retry as JSON.
-- Returns 1, or 0 if the job is no longer this worker's to give back.
local id, token, delay, why = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local job = load(id)
if not job or fence(job) ~= token then return 0 end
-- Told again by a worker that has not heard the answer.
if job.status == 'queued' then return 1 end
if job.status ~= 'running' then return 0 end
local key = job_key(id)
redis.call('HINCRBY', key, why == 'retry' and 'retries' or 'attempts', why == 'retry' and 1 or -1)
if ARGV[5] and ARGV[5] ~= '' then redis.call('HSET', key, 'last_error', ARGV[5]) end
if why == 'suspect' then redis.call('HSET', key, 'solo', 1) end
enqueue(id, job, now)
if delay > 0 then
  unqueue(id, job)
  index(DELAYED, now + delay, id)
end
return 1
