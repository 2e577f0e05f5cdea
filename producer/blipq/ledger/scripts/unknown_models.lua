-- Which of these models may no job name? ARGV: declared models between spaces, then models.
-- Returns what workers serve, then the names.
local answer = {served_models()}
for i = 2, #ARGV do
  if not is_known(ARGV[i], ARGV[1]) then answer[#answer + 1] = ARGV[i] end
end
return answer
