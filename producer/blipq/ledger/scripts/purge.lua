-- Cancels jobs that no worker has taken. ARGV: queue, ids. Returns how many.
local queue, cancelled = ARGV[1], 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local job = load(id)
  if job and job.status == 'queued' then
    end_job(id, job, 'cancelled', {})
    cancelled = cancelled + 1
  else
    unqueue(id, {queue = queue})
  end
end
return cancelled
