-- Which of these images do open jobs name? ARGV: cursor, how many jobs to go through, then the URIs
-- as requests have them, in quotation marks. Returns the next cursor, then the URIs that are named.
local page = redis.call('ZSCAN', OPEN, ARGV[1], 'COUNT', ARGV[2])
local answer, found = {page[1]}, {}
for i = 1, #page[2], 2 do
  local request = redis.call('HGET', job_key(page[2][i]), 'request') or ''
  for j = 3, #ARGV do
    if not found[j] and string.find(request, ARGV[j], 1, true) then
      found[j] = true
      answer[#answer + 1] = ARGV[j]
    end
  end
end
return answer
