-- Keeps a job that waits from being claimed for a while. ARGV: id, delay ms.
-- Returns 1, or 0 if it does not wait.
local id, delay = ARGV[1], tonumber(ARGV[2])
local job = load(id)
if not job or job.status ~= 'queued' then return 0 end
delay_job(id, job, delay)
return 1
