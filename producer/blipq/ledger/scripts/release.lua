-- Forgets jobs whose outcome somebody keeps elsewhere now. ARGV: ids. Returns how many.
-- A dead letter stays for its operator, and a job with a webhook for its event.
local released = 0
for _, id in ipairs(ARGV) do
  local found = redis.call('HMGET', job_key(id), 'status', 'keep_until', 'created_at', 'tenant',
    'model', 'kind')
  if ended({status = found[1]}) and not found[2] and not redis.call('ZSCORE', DEAD_LETTERS, id) then
    local job = {created_at = found[3], tenant = found[4], model = found[5], kind = found[6]}
    unlist_job(id, job, found[1])
    released = released + redis.call('UNLINK', job_key(id))
  end
end
return released
