-- Gives a running job back. ARGV: id, token, delay ms, why, the last error as JSON or '', and
-- for a crash the most crashes and the dead letter ttl ms. Why:
--   'retry'      counted as a retry
--   'hand-back'  not counted
--   'suspect'    not counted either, but from now on it runs alone
--   'lost'       its process died while it held this job among others: not counted, and suspect
--                where that happened before
--   'crash'      its process died of it, as far as is known: as if its lease had run out
-- Returns 1 if the job waits again, 2 if it ended by this crash, or 0 if it is no longer this
-- worker's to give back.
local id, token, delay, why = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local job = load(id)
if not job or fence(job) ~= token then return 0 end
-- Sent again by a worker that did not receive the reply.
if job.status == 'queued' then return 1 end
if job.status ~= 'running' then return 0 end
if why == 'crash' then
  return crashed(id, job, tonumber(ARGV[6]), tonumber(ARGV[7])) and 1 or 2
end
local key = job_key(id)
redis.call('HINCRBY', key, why == 'retry' and 'retries' or 'attempts', why == 'retry' and 1 or -1)
if ARGV[5] and ARGV[5] ~= '' then redis.call('HSET', key, 'last_error', ARGV[5]) end
local is_suspect = why == 'suspect' or why == 'lost' and redis.call('HINCRBY', key, 'losses', 1) > 1
if is_suspect then
  redis.call('HSET', key, 'solo', 1)
  -- One death is accounted for: it is charged for as many crashes alone as a job whose first death
  -- was a crash of a whole batch.
  redis.call('HSETNX', key, 'crashes', 1)
end
enqueue(id, job, now)
if delay > 0 then delay_job(id, job, delay) end
return 1
