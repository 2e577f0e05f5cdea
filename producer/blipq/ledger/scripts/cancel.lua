-- Cancels a job wherever it is. ARGV: id. Returns 'cancelled', 'ended' or 'unknown'.
local id = ARGV[1]
local job = load(id)
if not job then return 'unknown' end
if ended(job) then return 'ended' end
if tonumber(job.deadline) <= now then
  end_job(id, job, 'expired', {})
  return 'ended'
end
end_job(id, job, 'cancelled', {})
return 'cancelled'
