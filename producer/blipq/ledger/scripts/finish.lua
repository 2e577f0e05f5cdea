-- Ends a job with what its worker found. ARGV: id, token, status, dead letter ttl ms or 0,
-- then field/value pairs. Returns 1, or 0 if the job is no longer this worker's to end.
local id, token, status, dead_letter_ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local job = load(id)
if not job then return 0 end

-- A worker that did not receive the reply sends it again: it is stored already. The result itself may
-- have been dropped since, and so has the token; a receipt has the times of one run.
local function is_stored()
  if job.status ~= status then return false end
  for i = 5, #ARGV, 2 do
    local dropped = ARGV[i] == 'result' and (job.result_uri or job.delivered)
    if job[ARGV[i]] ~= ARGV[i + 1] and not dropped then return false end
  end
  return true
end

if ended(job) then return is_stored() and 1 or 0 end
if job.status ~= 'running' or fence(job) ~= token then return 0 end
if tonumber(job.deadline) <= now then
  end_job(id, job, 'expired', {})
  return 0
end
end_job(id, job, status, {unpack(ARGV, 5)})
if dead_letter_ttl > 0 then
  --RARELY bury
  bury(id, job, dead_letter_ttl)
end
return 1
