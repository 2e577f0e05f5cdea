-- Settles what is due and reads jobs for a list: all but their results, which may be large.
-- ARGV: ids. Returns {live workers of its model, whether its queue is paused (1 or 0), {}, field,
-- value, ...} of each, as read.lua does for one job without a look ahead; {} of an unknown one.
local FIELDS = {'kind', 'model', 'status', 'created_at', 'started_at', 'completed_at', 'deadline',
  'attempts', 'request', 'error', 'receipt', 'metadata', 'tenant', 'last_error', 'result_uri',
  'delivered', 'queue'}
local live, answers = {}, {}

local function waits_paused(found)
  local queue = found[#FIELDS]
  return found[3] == 'queued' and queue and is_paused(queue) and 1 or 0
end

local function settled(id)
  local found = redis.call('HMGET', job_key(id), unpack(FIELDS))
  if not found[3] or ended({status = found[3]}) or tonumber(found[7]) > now then return found end
  end_job(id, load(id), 'expired', {})
  return redis.call('HMGET', job_key(id), unpack(FIELDS))
end

for i, id in ipairs(ARGV) do
  local found, answer = settled(id), {}
  local model = found[2]
  if model then
    live[model] = live[model] or live_workers(model)
    answer[1], answer[2], answer[3] = live[model], waits_paused(found), {}
  end
  for j, name in ipairs(FIELDS) do
    if found[j] then
      answer[#answer + 1] = name
      answer[#answer + 1] = found[j]
    end
  end
  answers[i] = answer
end
return answers
